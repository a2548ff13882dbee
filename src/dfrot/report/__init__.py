"""Result records and inspections as figures, tables and one HTML page."""
