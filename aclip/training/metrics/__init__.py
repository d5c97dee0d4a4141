"""What a run reports while it trains: lines, curves, pages."""
