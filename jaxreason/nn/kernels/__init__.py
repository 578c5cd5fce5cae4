"""Forms of parts that one platform runs faster; `nn` chooses among them by `kernels`."""
