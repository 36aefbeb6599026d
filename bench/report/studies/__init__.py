"""What `shortllama study` found, as part of a report: figures, tables beside the paper's, and findings."""
