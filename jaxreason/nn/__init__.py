"""Parts of transformers: pure functions on arrays, and the ParamSpecs they need."""
