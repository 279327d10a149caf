"""Reports of runs: their learning curves, what they learned and cost, on one page of HTML."""
