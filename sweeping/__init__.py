"""Many runs: planning them, launching them, collecting and searching."""
