"""Operations with a reference and faster forms: torch only, process groups are arguments."""
