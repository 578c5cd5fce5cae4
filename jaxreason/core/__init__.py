"""What every other room may import: parameters, meshes, precision, randomness, text, errors."""
