"""Where rollouts run: in the training processes, on ranks of their own, or on servers; and how weights get there."""
