"""Where answers break: for every exercise a right object to compare with, and the inputs at the edge."""
