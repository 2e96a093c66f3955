"""What released versions of Transformer Engine accept, and what is asked of them here."""
