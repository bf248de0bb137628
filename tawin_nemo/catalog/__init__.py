"""Items, their token paths, and the trie over them."""
