"""Looking inside a model: what one pass shows of it, as a record (record.py), a picture, or a page."""
