"""Lists of pairs, read in blocks: every row of a list is a row here."""
