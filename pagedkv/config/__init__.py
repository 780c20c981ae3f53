"""Settings, sizes, and what fits into budgets."""
