"""Looking at what is stored: diagnostics, comparisons, single completions, reports. No torch."""
