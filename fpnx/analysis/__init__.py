"""Questions to stored features: which levels are alike, which level tells classes apart; and copies for other tools."""
