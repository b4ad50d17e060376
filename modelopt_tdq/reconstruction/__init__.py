"""PTQ reconstruction: learned rounding of the weights and learned intervals, block by block."""
