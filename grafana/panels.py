"""What Grafana's dashboard file is made of: graphs, heatmaps, selectors, and their places."""

DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}

GREEN, YELLOW, ORANGE, RED, BLUE, PURPLE, GREY = (
    "green", "yellow", "orange", "red", "blue", "purple", "#8e8e8e",
)

LINE = {"drawStyle": "line", "lineWidth": 2, "fillOpacity": 10, "showPoints": "never", "spanNulls": False}
# Without an outline, which a stacked zero would draw on top of the others.
STACKED = {"stacking": {"mode": "normal", "group": "A"}, "fillOpacity": 60, "lineWidth": 0}
STEPS = {"lineInterpolation": "stepAfter", "fillOpacity": 0}


def override(name, **properties):
    """What one series, by its legend, has of its own. Underscores stand for the dots of a path."""
    return {
        "matcher": {"id": "byName", "options": name},
        "properties": [
            {"id": key.replace("_", "."), "value": value} for key, value in properties.items()
        ],
    }


def colour(name, fixed, **properties):
    return override(name, color={"mode": "fixed", "fixedColor": fixed}, **properties)


def dashed(name, fixed=GREY):
    return colour(
        name, fixed, custom_lineStyle={"fill": "dash", "dash": [10, 10]}, custom_fillOpacity=0
    )


def panel(title, unit, description, *targets, width=8, height=8, limits=(), custom=None, overrides=(),
          table=None, up_to=None, **defaults):
    """A graph over time. `targets` are pairs of legend and query; `limits` are pairs of a value and
    the colour from it on; `table` is where a legend with numbers stands; `up_to` is what the axis
    shows at least: without it a graph of zeros has an axis up to 100."""
    steps = [{"color": GREEN, "value": None}]
    steps += [{"color": shade, "value": value} for value, shade in limits]
    shown = "line" if limits else "off"
    return {
        "type": "timeseries",
        "title": title,
        "description": description,
        "datasource": DATASOURCE,
        "gridPos": {"h": height, "w": width, "x": 0, "y": 0},
        "targets": [target(i, legend, query) for i, (legend, query) in enumerate(targets)],
        "fieldConfig": {
            "defaults": {
                "unit": unit,
                "min": 0,
                **defaults,
                "color": {"mode": "palette-classic"},
                "thresholds": {"mode": "absolute", "steps": steps},
                "custom": {
                    **LINE,
                    **(custom or {}),
                    **({"axisSoftMax": up_to} if up_to is not None else {}),
                    "thresholdsStyle": {"mode": shown},
                },
            },
            "overrides": list(overrides),
        },
        "options": {
            "legend": {
                "showLegend": True,
                "displayMode": "table" if table else "list",
                "placement": table or "bottom",
                # `last`: a series that has ended shows nothing, where `lastNotNull` shows its past.
                "calcs": ["last", "max"] if table else [],
                **({"sortBy": "Max", "sortDesc": True} if table else {}),
            },
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
    }


def heatmap(title, unit, description, query, width=12, height=9):
    """Observations over time by bucket."""
    return {
        "type": "heatmap",
        "title": title,
        "description": description,
        "datasource": DATASOURCE,
        "gridPos": {"h": height, "w": width, "x": 0, "y": 0},
        "targets": [{**target(0, "{{le}}", query), "format": "heatmap"}],
        "fieldConfig": {"defaults": {"unit": "reqps"}, "overrides": []},
        "options": {
            "calculate": False,
            "cellGap": 1,
            "color": {
                "mode": "scheme", "scheme": "Oranges", "fill": "dark-orange", "scale": "exponential",
                "exponent": 0.5, "steps": 64, "reverse": False,
            },
            "exemplars": {"color": "rgba(255,0,255,0.7)"},
            "filterValues": {"le": 1e-9},
            "legend": {"show": True},
            "rowsFrame": {"layout": "auto"},
            "showValue": "never",
            "tooltip": {"mode": "single", "yHistogram": True},
            "yAxis": {"axisPlacement": "left", "reverse": False, "unit": unit},
        },
    }


def target(index, legend, query):
    return {
        "refId": chr(ord("A") + index),
        "datasource": DATASOURCE,
        "editorMode": "code",
        "expr": query,
        "legendFormat": legend,
        "range": True,
    }


def laid_out(rows):
    """The panels with ids and places: rows of panels, left to right, 24 columns wide."""
    panels, y = [], 0
    for title, members in rows:
        row = {"type": "row", "title": title, "collapsed": False, "panels": []}
        panels.append({**row, "gridPos": {"h": 1, "w": 24, "x": 0, "y": y}})
        x, y = 0, y + 1
        for member in members:
            place = member["gridPos"]
            place["x"], place["y"] = x, y
            x += place["w"]
            if x >= 24:
                x, y = 0, y + place["h"]
            panels.append(member)
    return [{"id": i + 1, **member} for i, member in enumerate(panels)]


def selector(name, label, every, *above):
    """A multi-select variable; `every` is what All matches. Those above it narrow it down."""
    narrowed = ", ".join(f'{other}=~"${other}"' for other in above)
    series = f"product_order_total{{{narrowed}}}" if narrowed else "product_order_total"
    query = f"label_values({series}, {name})"
    return {
        "type": "query", "name": name, "label": label, "datasource": DATASOURCE,
        "query": query, "refresh": 2, "sort": 1, "regex": "", "hide": 0,
        "multi": True, "includeAll": True, "allValue": every,
        "current": {"selected": True, "text": ["All"], "value": ["$__all"]}, "options": [],
    }
