"""Learning scales: QAT schemes, learned weight scales, PTQ reconstruction."""
