"""What is tried and may go again: README.md has an owner, a reason and a rule for removal of each."""
