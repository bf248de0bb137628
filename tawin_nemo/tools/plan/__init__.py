"""What a recipe needs on a cluster, worked out without one: memory per GPU, layouts that fit, FLOPs and step time."""
