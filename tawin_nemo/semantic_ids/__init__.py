"""Item vectors -> a few codes per item: quantisers, collisions, index files, growth, and what an index is worth."""
