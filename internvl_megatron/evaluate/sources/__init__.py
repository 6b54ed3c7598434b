"""Files of public data sets, read a record at a time."""
