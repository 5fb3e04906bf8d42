"""Everything people read about a compressed model: tables, pictures, the report, the model card, and the Hub."""
