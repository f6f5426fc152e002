"""Many runs together: tables over seeds."""
