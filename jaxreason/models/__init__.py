"""Models: settings of shared parts, described by ParamSpecs and run by pure functions."""
