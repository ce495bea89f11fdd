"""The timer, the cards and the model of step time that training, plan and bench share."""
