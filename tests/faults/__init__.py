"""The fault table: one row, one fault, one typed error, nothing left and nothing leaked.

`table.py` says what a row is and runs it; the other modules hold the rows, grouped by what is broken. `test_faults.py` runs
every row as a test, `scripts/faults --report` prints the whole as one table. More files than a folder should have: a group
that can be read at once is worth it.
"""
