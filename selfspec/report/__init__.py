"""What jobs leave, and what readers are shown of it: results, tables, plots."""
