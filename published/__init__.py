"""Published weights, in and out: foreign names end here."""
