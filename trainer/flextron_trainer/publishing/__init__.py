"""What a model becomes for others: levels, a card with scores, a commit on the Hub."""
