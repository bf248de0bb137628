"""Figure 3 of TAWin (arXiv 2604.22504) by simulation."""
