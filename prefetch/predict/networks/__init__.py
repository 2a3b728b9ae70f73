"""The nets of learned predictors, and the one way that they are trained."""
