"""Operations with a reference and faster implementations. torch only; process groups are arguments."""
