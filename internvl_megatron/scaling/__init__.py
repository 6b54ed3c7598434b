"""What a model costs: parameters and floating-point operations in closed form."""
