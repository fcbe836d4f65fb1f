"""Ready runs: data, options and scripts that were tried, with the results to expect."""
