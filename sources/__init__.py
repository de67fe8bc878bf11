"""Raw material into data sets under data/."""
