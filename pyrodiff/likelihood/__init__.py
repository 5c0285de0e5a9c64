"""log p(x_0), or a bound on it, by several methods and in one table."""
