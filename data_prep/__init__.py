"""Raw review logs to prepared data sets: Amazon Review 2018, Yelp, the MiniOneRec layout and a synthetic log."""
