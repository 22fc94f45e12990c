"""Boot and measure: scenarios, runs of them, their figures, budgets, reports and comparisons."""
