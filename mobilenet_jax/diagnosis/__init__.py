"""Where a trained network loses information: dead filters, saturation, rank, and what int8 would cost."""
