"""Where a trained network loses information: dead filters, saturation, rank, and the cost of int8."""
