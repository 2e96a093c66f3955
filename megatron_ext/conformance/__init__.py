"""Compare a machine, a precision and a layout with the reference's recorded numbers.

The recorded files are described beside them (tests/golden). Sizes, ids, shifts and counts come
from the files; what may differ and by how much stands in `tolerances` alone.
"""
