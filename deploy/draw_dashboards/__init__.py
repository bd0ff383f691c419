"""Draws the dashboards as pictures from a Prometheus, without Grafana: to see them before they are deployed."""
