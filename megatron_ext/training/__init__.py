"""The loop and what it is made of: build, step, validation, reports, reasons to stop."""
