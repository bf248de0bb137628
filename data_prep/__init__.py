"""Raw review logs to prepared data sets: tables, Amazon, Yelp, ready-made splits and a synthetic log."""
