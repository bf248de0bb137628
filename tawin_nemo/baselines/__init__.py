"""Classic sequential recommenders, trained from scratch: GRU4Rec, Caser, SASRec, HSTU, eSASRec, TIGER."""
