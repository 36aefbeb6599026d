"""Results into figures, tables and pages."""
