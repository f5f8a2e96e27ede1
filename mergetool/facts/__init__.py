"""What can be measured about whole models; pure."""
