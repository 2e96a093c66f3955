"""What a run would need and how long it would take, before there is a machine to run it."""
