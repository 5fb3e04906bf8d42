"""What people read of a compressed model: tables, pictures, the report, the model card, and the Hub."""
