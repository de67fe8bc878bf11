"""Sources of data sets: texts, documents, images, and the data sets that are known by name."""
