"""What is checked about a prepared data set, and the page that shows it."""
